"""Low-rank adapters against the formula, merged against unmerged, and a mixed batch against each alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from models.adapters import Adapters, linear_names
from models.language_model import from_config
from tests.models.conftest import ARCHITECTURES, SIZE, tiny

CLUSTERS, RANK = 3, 2
TOKENS = torch.tensor([[1, 5, 6, 7, 2, 1], [1, 8, 8, 4, 5, 2], [1, 9, 10, 11, 2, 1], [1, 5, 2, 1, 6, 2]])


def adapted(architecture: str = "opt", seed: int = 0) -> Adapters:
    """Adapters that have learnt something."""
    made = Adapters(tiny(architecture).model, CLUSTERS, RANK)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith(".B"):
                parameter.normal_(std=0.3)
    return made.eval()


def logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=TOKENS).logits
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
class TestContract:
    """What holds for every architecture."""

    def test_new_adapters_change_nothing(self, architecture: str) -> None:
        before = logits(tiny(architecture).model)
        made = Adapters(tiny(architecture).model, CLUSTERS, RANK).eval()
        assert torch.equal(logits(made.trunk), before)
        with torch.inference_mode():
            assert torch.equal(made(torch.tensor([0, 1, 2, 1]), input_ids=TOKENS).logits, before)
        assert torch.equal(logits(made.merge(1)), before)

    def test_merged_is_unmerged(self, architecture: str) -> None:
        made = adapted(architecture)
        merged = [logits(made.merge(k)) for k in range(CLUSTERS)]
        for k in range(CLUSTERS):
            with made.using(k) as trunk:
                torch.testing.assert_close(logits(trunk), merged[k], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(merged[0], merged[1], atol=0.1)

    def test_a_mixed_batch_is_each_row_alone(self, architecture: str) -> None:
        made = adapted(architecture)
        clusters = torch.tensor([2, 0, 1, 2])
        with torch.inference_mode():
            mixed = made(clusters, input_ids=TOKENS).logits
            for row, k in enumerate(clusters.tolist()):
                alone = made(k, input_ids=TOKENS[[row]]).logits[0]
                torch.testing.assert_close(mixed[row], alone, rtol=1e-4, atol=1e-4)

    def test_all_linear_layers_of_the_blocks_and_no_other(self, architecture: str) -> None:
        trunk = tiny(architecture).model
        names = linear_names(trunk)
        assert len(names) == 2 * (6 if architecture == "opt" else 7)
        assert all(".layers." in name for name in names)
        made = adapted(architecture)
        assert made.tensors().keys() == {f"{name}.{part}" for name in names for part in "AB"} | {"scale"}

    def test_the_weight_is_the_formula(self, architecture: str) -> None:
        made = adapted(architecture)
        base, merged, tensors = made.plain(), made.merge(2), made.tensors()
        for name in linear_names(base):
            a, b = tensors[f"{name}.A"][2].double(), tensors[f"{name}.B"][2].double()
            expected = base.get_parameter(f"{name}.weight").double() + 8.0 / RANK * b @ a
            torch.testing.assert_close(merged.get_parameter(f"{name}.weight").double(), expected, rtol=0, atol=1e-5)

    def test_saved_and_loaded_it_is_the_same(self, architecture: str, tmp_path: Path) -> None:
        made = adapted(architecture)
        save_file(made.tensors(), tmp_path / "adapters.safetensors")
        again = Adapters.from_tensors(made.plain(), load_file(tmp_path / "adapters.safetensors"))
        for k in range(CLUSTERS):
            assert torch.equal(logits(again.merge(k)), logits(made.merge(k)))


def test_it_fits_grouped_key_value_heads() -> None:
    config = LlamaConfig(
        vocab_size=SIZE, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    made = Adapters(from_config(config), 2)
    assert made.trunk.get_parameter("model.layers.0.self_attn.k_proj.B").shape == (2, 4, 4)
    assert logits(made.merge(1)).shape == (4, 6, SIZE)


def test_a_frozen_trunk_leaves_only_adapters_to_learn() -> None:
    made = adapted()
    made.freeze()
    made(torch.tensor([0, 1, 0, 1]), input_ids=TOKENS).logits.sum().backward()
    for name, parameter in made.named_parameters():
        assert (parameter.grad is not None) == name.endswith((".A", ".B"))
    b = made.trunk.get_parameter("model.decoder.layers.0.fc1.B")
    assert b.grad is not None and b.grad[0].any() and not b.grad[2].any()  # nobody of cluster 2 was there


def test_page_embeddings_that_are_new_learn_beside_the_adapters() -> None:
    made = adapted()
    made.freeze(embeddings=False)
    learning = {name for name, parameter in made.trunk.named_parameters() if parameter.requires_grad}
    assert {name for name in learning if not name.endswith((".A", ".B"))} == {"model.decoder.embed_tokens.weight"}


def test_dropout_is_of_the_addition_alone_and_in_training_alone() -> None:
    made = Adapters(tiny().model, CLUSTERS, RANK, dropout=0.5)
    before = logits(made.trunk.eval())
    with torch.no_grad():
        assert torch.equal(made.train()(0, input_ids=TOKENS).logits, before)  # B is zero: nothing is added
        for name, parameter in made.named_parameters():
            if name.endswith(".B"):
                parameter.normal_(std=0.3)
        one, other = (made(0, input_ids=TOKENS).logits for _ in range(2))
        assert not torch.equal(one, other)
        made.eval()
        assert torch.equal(made(0, input_ids=TOKENS).logits, made(0, input_ids=TOKENS).logits)


FC1 = "model.decoder.layers.0.fc1"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda tensors: tensors.clear(), "need tensors"),
        (lambda tensors: tensors.pop("scale"), "need tensors"),
        (lambda tensors: tensors.pop(f"{FC1}.B"), f"{FC1}.B is in only one"),
        (lambda tensors: tensors.update({"x.A": torch.zeros(3, 2, 4)}), "x.A is in only one"),
        (
            lambda tensors: tensors.update({f"{FC1}.B": torch.zeros(3, 9, 2)}),
            r"fc1.B is \(3, 9, 2\).* needs \(3, 64, 2\)",
        ),
        (lambda tensors: tensors[f"{FC1}.A"].fill_(torch.nan), "fc1.A holds NaN"),
    ],
)
def test_tensors_that_do_not_fit_are_named(spoil: Callable[[dict[str, Any]], Any], words: str) -> None:
    tensors = {name: value.clone() for name, value in adapted().tensors().items()}
    spoil(tensors)
    with pytest.raises(ValueError, match=words):
        Adapters.from_tensors(tiny().model, tensors)
