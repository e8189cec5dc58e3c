"""Small models of transformers: there and back bit by bit, the same logits, continuation, loss and gradients."""

import json

import pytest
import torch
import torch.nn.functional as F

from conversion import hf_models
from conversion.hf_models import LENGTH, MODELS, VOCAB, read_all
from conversion.small import convert
from conversion.test_hf import mixtral_tensors, write_folder, write_tokenizer
from megatron_moe.config.sampling import SamplingConfig
from megatron_moe.conversion.hf.folder import Cutter
from megatron_moe.conversion.hf.source import places_of, read_configuration
from megatron_moe.inference.generate import generate
from megatron_moe.inference.load import load_for_inference

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")


ALWAYS = ("gpt2", "mixtral", "deepseek_v3")  # the others with --full


@pytest.fixture(scope="module", params=[kind if kind in ALWAYS else pytest.param(kind, marks=pytest.mark.matrix) for kind in MODELS])
def pair(request, tmp_path_factory):
    """(their model, its folder, ours loaded from the run directory that was made of it)."""
    base = tmp_path_factory.mktemp("pair")
    theirs = hf_models.save(transformers, request.param, base / "hf")
    return theirs, base / "hf", base


def converted(base, capsys):
    if not (base / "native").exists():
        code, out, err = convert(capsys, "hf", "native", base / "hf", base / "native", "--verify")
        assert code == 0, err
    return base / "native"


def tokens():
    return torch.randint(0, VOCAB, (2, LENGTH + 1), generator=torch.Generator().manual_seed(5))


def test_there_and_back_is_bit_equal_in_every_tensor(pair, capsys):
    theirs, folder, base = pair
    native = converted(base, capsys)
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    code, out, err = convert(capsys, "native", "hf", native, base / "back", "--verify", "--hf-model-type", kind)
    assert code == 0, err
    before, after = read_all(folder), read_all(base / "back")
    assert before.keys() == after.keys()
    assert all(before[n].dtype == after[n].dtype and torch.equal(before[n], after[n]) for n in before)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(base / "back", attn_implementation="eager", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    x = tokens()[:, :-1]
    assert torch.equal(again.eval()(input_ids=x).logits, theirs(input_ids=x).logits)


def test_logits_and_a_greedy_continuation_are_the_same(pair, capsys):
    theirs, _, base = pair
    ours = load_for_inference(converted(base, capsys))
    x = tokens()[:, :-1]
    with torch.no_grad():
        logits = ours.model(x, torch.arange(LENGTH).expand_as(x))[..., :VOCAB]
        reference = theirs(input_ids=x).logits
    assert reference.abs().max() > 1
    assert (logits - reference).abs().max() < 1e-4
    continued = generate(ours.model, x[:1].tolist(), 64, SamplingConfig(greedy=True))
    expected = theirs.generate(x[:1], max_new_tokens=64, do_sample=False, use_cache=True, pad_token_id=0)
    assert continued[0][-64:] == expected[0, -64:].tolist()


def test_a_training_step_has_the_same_loss_and_gradients(pair, capsys):
    theirs, folder, base = pair
    model = load_for_inference(converted(base, capsys)).model
    text = tokens()
    losses = model(text[:, :-1], torch.arange(LENGTH).expand(2, LENGTH), text[:, 1:])
    reference = F.cross_entropy(theirs(input_ids=text[:, :-1]).logits.flatten(0, 1), text[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(losses.flatten(), reference, rtol=1e-5, atol=1e-5)
    losses.mean().backward()
    theirs.zero_grad()
    reference.mean().backward()
    gradients = {f"model.{name}": p.grad for name, p in model.named_parameters()}
    ours = under_their_names(folder, gradients)
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def under_their_names(folder, tensors):
    """As they are in the memory of transformers: the experts of a layer in one tensor."""
    family, run, _, _ = read_configuration(folder)
    shapes = {name: {"shape": list(t.shape)} for name, t in tensors.items()}
    map_ = places_of(family.fused or family.names, shapes, VOCAB, is_fused=family.fused is not None)

    class Gradients:
        read = staticmethod(lambda names: ((name, tensors[name]) for name in names))

    cutter = Cutter(Gradients, map_)
    names = list(dict.fromkeys(place.name for places in map_.values() for place in places.of))
    return dict(zip(names, cutter.read(names)))


def test_the_tokenizer_of_an_export_is_found_by_transformers(tmp_path, capsys):
    folder = write_folder(tmp_path / "hf", mixtral_tensors())
    write_tokenizer(folder)
    assert convert(capsys, "hf", "native", folder, tmp_path / "native")[0] == 0
    assert convert(capsys, "native", "hf", tmp_path / "native", tmp_path / "out")[0] == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = f"{chr(0x4E05)} {chr(0x4E09)}"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == [5, 9]
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("</s>", 1)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.dtype, model.generation_config.eos_token_id) == (torch.bfloat16, 1)
