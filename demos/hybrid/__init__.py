"""What attention adds to a state: recall of more keys than a state-space layer can hold.

python -m demos.hybrid.train    train one of the models
python -m demos.hybrid          look into those that come with it (`make hybrid`)
"""
