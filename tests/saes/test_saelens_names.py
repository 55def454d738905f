"""SAELens by heart: every public name of sae-lens 6.54.12 works here or gives one line that says what to use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import saes
from saes import SAE, SparseCoder, sae_config
from saes.options import OptionError
from saes.saelens_names import CODER, CONFIG, LOADING, MODEL, MODULES, OPTIONS, SYNTHETIC, TOP, advice, table
from saes.training import train_sae

DOCS = Path(__file__).parents[2] / "docs" / "moving.md"

PACKAGE = """
    SAE SAEConfig TrainingSAE TrainingSAEConfig HookedSAETransformer ActivationsStore LanguageModelSAERunnerConfig
    LanguageModelSAETrainingRunner CacheActivationsRunnerConfig CacheActivationsRunner PretokenizeRunnerConfig
    PretokenizeRunner pretokenize_runner run_evals upload_saes_to_huggingface PretrainedSaeHuggingfaceLoader
    PretrainedSaeDiskLoader register_sae_class register_sae_training_class StandardSAE StandardSAEConfig
    StandardTrainingSAE StandardTrainingSAEConfig GatedSAE GatedSAEConfig GatedTrainingSAE GatedTrainingSAEConfig
    TopKSAE TopKSAEConfig TopKTrainingSAE TopKTrainingSAEConfig JumpReLUSAE JumpReLUSAEConfig JumpReLUTrainingSAE
    JumpReLUTrainingSAEConfig SAETrainingRunner SAETrainer LoggingConfig AbsTopKSAE AbsTopKSAEConfig AbsTopKTrainingSAE
    AbsTopKTrainingSAEConfig BatchTopKTrainingSAE BatchTopKTrainingSAEConfig Transcoder TranscoderConfig SkipTranscoder
    SkipTranscoderConfig JumpReLUTranscoder JumpReLUTranscoderConfig JumpReLUSkipTranscoder JumpReLUSkipTranscoderConfig
    MatryoshkaBatchTopKTrainingSAE MatryoshkaBatchTopKTrainingSAEConfig TemporalSAE TemporalSAEConfig MatchingPursuitSAE
    MatchingPursuitTrainingSAE MatchingPursuitSAEConfig MatchingPursuitTrainingSAEConfig MultiSAEEvaluator
    MultiSAETrainingRunner MultiSAETrainingRunnerConfig SAETransformerBridge
    load_model get_pretrained_saes_directory get_norm_scaling_factor EvalConfig
""".split()  # noqa: SIM905

METHODS = """
    cfg dtype device W_enc W_dec b_dec use_error_term fold_activation_norm_scaling_factor fold_activation_whitening
    get_activation_fn initialize_weights encode decode turn_on_forward_pass_hook_z_reshaping
    turn_off_forward_pass_hook_z_reshaping to process_sae_in forward process_state_dict_for_saving
    process_state_dict_for_loading fold_W_dec_norm get_W_dec_norm fold_and_get_W_dec_norm get_name save_model
    load_from_pretrained load_from_disk from_pretrained from_pretrained_with_cfg_and_sparsity from_dict
    get_sae_class_for_architecture get_sae_config_class_for_architecture get_coefficients encode_with_hidden_pre
    calculate_aux_loss training_forward_pass save_inference_model log_histograms load_weights_from_checkpoint
    hook_sae_input hook_sae_acts_pre hook_sae_acts_post hook_sae_output hook_sae_recons hook_sae_error run_with_cache
    run_with_hooks activation_fn
""".split()  # noqa: SIM905

FIELDS = """
    d_in d_sae dtype device apply_b_dec_to_input normalize_activations reshape_activations metadata architecture to_dict
    from_dict k rescale_acts_by_decoder_norm hook_name hook_name_out model_name
""".split()  # noqa: SIM905


def made() -> SAE:
    return SAE(sae_config("blocks.1.hook_resid_post", 6, 16, k=3), seed=0)


@pytest.mark.parametrize("name", PACKAGE)
def test_of_the_package(name):
    if name == "SAE":
        return
    with pytest.raises(ImportError) as error:  # as in `from saes import name`
        __import__("saes", fromlist=[name])
    assert str(error.value) == advice(name, TOP)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", MODULES)
def test_of_its_modules(name):
    """Asked for as modules, with what is in them, and as names."""
    for line in (f"import saes.{name}", f"import saes.{name}.what.ever", f"from saes.{name} import what"):
        with pytest.raises(ImportError) as error:
            exec(line)
        assert str(error.value) == advice(name, MODULES)
    if "." not in name:
        with pytest.raises(ImportError) as error:
            __import__("saes", fromlist=[name])
        assert str(error.value) == advice(name, MODULES)


@pytest.mark.parametrize(
    ("module", "name", "uses"),
    [
        ("saes.config", "LanguageModelSAERunnerConfig", TOP),
        ("saes.registry", "register_sae_class", TOP),
        ("saes.training", "SAETrainer", TOP),
        ("saes.synthetic", "FeatureDictionary", SYNTHETIC),
    ],
)
def test_of_modules_that_are_here_too(module, name, uses):
    with pytest.raises(ImportError) as error:
        exec(f"from {module} import {name}")
    assert str(error.value) == advice(name, uses)
    with pytest.raises(ModuleNotFoundError):
        exec("import saes.nothing_of_the_kind")


@pytest.mark.parametrize("name", METHODS)
def test_of_an_sae(name):
    coder = made()
    if name in CODER:
        with pytest.raises(AttributeError) as error:
            getattr(coder, name)
        assert str(error.value) == advice(name, CODER)
        assert not hasattr(coder, name)
        with pytest.raises(AttributeError) as error:  # a value that nothing reads would be worse than an error
            setattr(coder, name, True)
        assert str(error.value) == advice(name, CODER)
        with pytest.raises(AttributeError) as error:  # many are methods of the class
            getattr(SAE, name)
        assert str(error.value) == advice(name, CODER)
    else:
        assert getattr(coder, name) is not None


@pytest.mark.parametrize("name", FIELDS)
def test_of_its_config(name):
    cfg = made().cfg.replace(model_name="m")
    if name in CONFIG:
        with pytest.raises(AttributeError) as error:
            getattr(cfg, name)
        assert str(error.value) == advice(name, CONFIG)
    else:
        assert getattr(cfg, name) is not None


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_a_training(name):
    with pytest.raises(OptionError) as error:  # though what it stands for, such as hook_site, is missing
        train_sae(None, **{name: 1})
    assert str(error.value) == f"train_sae has no argument {name!r}: {advice(name, OPTIONS)}"


@pytest.mark.parametrize("name", LOADING)
def test_arguments_of_from_pretrained(name):
    with pytest.raises(TypeError) as error:
        SAE.from_pretrained(**{name: "x"})
    assert str(error.value) == f"from_pretrained has no argument {name!r}: {advice(name, LOADING)}"


def test_what_works_works(tmp_path):
    coder = made()
    weights, config = coder.save_model(tmp_path / "c")
    assert weights.is_file()
    assert config.is_file()
    for back in (SAE.load_from_disk(tmp_path / "c"), SparseCoder.load_from_pretrained(tmp_path / "c")):
        assert torch.equal(back.W_enc, coder.W_enc)
    assert SAE.load_from_disk(tmp_path / "c", dtype="float64").dtype == torch.float64
    assert coder.cfg.hook_name == coder.cfg.hook_name_out == "blocks.1.hook_resid_post"
    assert (coder.device, coder.dtype) == (torch.device("cpu"), torch.float32)
    assert saes.train_sae is train_sae
    with pytest.raises(AttributeError, match="'CoderConfig' object has no attribute 'hook_nam'"):
        _ = coder.cfg.hook_nam
    with pytest.raises(AttributeError, match="has no attribute 'encod'"):
        _ = coder.encod


def test_names_that_exist_are_not_listed():
    coder = made()
    assert not [name for name in TOP if name in vars(saes)]
    assert not [name for name in CODER if hasattr(coder, name)]
    assert not [name for name in CONFIG if hasattr(coder.cfg, name)]


@pytest.mark.parametrize("uses", [TOP, MODULES, SYNTHETIC, CODER, LOADING, CONFIG, OPTIONS, MODEL])
def test_the_documents_tables_are_these(uses):
    assert f"|---|---|\n{table(uses)}\n\n" in DOCS.read_text(encoding="utf-8")
