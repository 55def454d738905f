"""The case study: a feature that reads like hunger, tested claim by claim, and its circuit.

python -m demos.hunger              the bundled model and the one of real text alone; everything goes to out/hunger
python -m demos.hunger --quick      the same with fewer of everything, to see that it runs
python -m demos.hunger --cut --models tinystories-told-4l/write tinystories-4l-real/write --out out/hunger-told
                                    write dictionaries, on a model that knows the story and on the control

A published story about MambaCoders: in "I like to eat toast for breakfast. I'm so" a feature is active that reads like
"hungry"; turned up, it makes the model say so; and its circuit goes through a mixer head at the food. Each part of it
is a claim with a threshold in `claims`, which stood there before any result did; sentences and words are in `concepts`,
sizes and seeds in `options`. Nothing is chosen by hand: where no feature of hunger holds up, the same script takes the
best of a fixed list of other feelings, and what failed is published as well.
"""
