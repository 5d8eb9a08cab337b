"""The direction of a metric is read from its name, or not guessed at all."""

from __future__ import annotations

import pytest

from hf_divguard.core.metrics import (
    HIGHER_IS_BETTER,
    LOWER_IS_BETTER,
    greater_is_better,
    with_eval_prefix,
)


@pytest.mark.parametrize("name", ["loss", "perplexity", "wer", "cer", "error", "mse", "rmse", "mae", "nll"])
def test_errors_and_losses_are_better_when_smaller(name: str) -> None:
    assert greater_is_better(name) is False
    assert greater_is_better(f"eval_{name}") is False


@pytest.mark.parametrize("name", ["accuracy", "f1", "bleu", "rouge", "precision", "recall", "mcc", "auc"])
def test_scores_are_better_when_greater(name: str) -> None:
    assert greater_is_better(name) is True
    assert greater_is_better(f"eval_{name}") is True


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("eval_squad_f1", True),
        ("eval_german-news_loss", False),
        ("eval_hamming_loss", False),
        ("rougeLsum", True),
        ("eval_ROUGE2", True),
        ("cosine_accuracy@10", True),
        ("eval_top-5", True),
        ("eval_map_loss", False),
        ("eval_accuracy_error", False),
        ("eval_rewards/margins", True),
        ("eval_rewards/accuracies", True),
    ],
)
def test_the_longest_known_ending_decides(name: str, expected: bool) -> None:
    assert greater_is_better(name) is expected


@pytest.mark.parametrize("name", ["zork", "eval_zork", "", "eval_", "accuracy_zork", "lossless", "f1x", "@5"])
def test_an_unknown_name_has_no_direction(name: str) -> None:
    assert greater_is_better(name) is None


def test_no_name_stands_on_both_sides() -> None:
    assert not LOWER_IS_BETTER & HIGHER_IS_BETTER


@pytest.mark.parametrize("name", sorted(LOWER_IS_BETTER | HIGHER_IS_BETTER))
def test_every_name_of_the_table_is_found_in_it(name: str) -> None:
    expected = name in HIGHER_IS_BETTER
    assert greater_is_better(name) is expected
    assert greater_is_better(f"eval_{name}") is expected
    assert greater_is_better(f"eval_some-set_{name.upper()}") is expected


def test_the_prefix_is_added_once() -> None:
    assert with_eval_prefix("f1") == "eval_f1"
    assert with_eval_prefix("eval_f1") == "eval_f1"
    assert with_eval_prefix(with_eval_prefix("f1")) == "eval_f1"
