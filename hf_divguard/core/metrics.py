"""Which direction of a metric is better, from its name."""

from __future__ import annotations

import re
from typing import Any

__all__ = [
    "HIGHER_IS_BETTER",
    "LOWER_IS_BETTER",
    "evaluation_loss_key",
    "greater_is_better",
    "with_eval_prefix",
]

LOWER_IS_BETTER = frozenset(
    "loss nll perplexity ppl bpb bpc bits_per_byte wer cer ter mer wil error err errors mse rmse mae mape "
    "smape msle rmsle brier brier_score fid kid kl kl_div cross_entropy crossentropy entropy eer divergence "
    "distance edit_distance hamming_loss ece log_loss calibration_error equal_error_rate grad_norm".split()
)
"""Last part of the names whose smaller values are better."""

HIGHER_IS_BETTER = frozenset(
    "accuracy acc top1 top5 top_1 top_5 f1 f1_score f_score fbeta precision recall sensitivity specificity auc "
    "auroc roc_auc pr_auc aucpr ap map mean_average_precision average_precision mrr ndcg bleu sacrebleu bleurt "
    "rouge rouge1 rouge2 rougel rougelsum meteor chrf chrf++ bertscore bert_score spearman spearmanr spearman_rho "
    "pearson pearsonr mcc matthews matthews_correlation kappa cohen_kappa r2 r2_score r_squared iou miou mean_iou "
    "jaccard dice dice_score psnr ssim exact exact_match em pass_at_1 reward win_rate "
    "rewards_accuracies rewards_margins".split()
)
"""Last part of the names whose greater values are better."""


def with_eval_prefix(name: str) -> str:
    """Return ``name`` as ``Trainer.evaluate`` reports it: with ``eval_`` before it.

    Example:
        >>> with_eval_prefix("loss"), with_eval_prefix("eval_f1")
        ('eval_loss', 'eval_f1')
    """
    return name if name.startswith("eval_") else f"eval_{name}"


def greater_is_better(name: str) -> bool | None:
    """Return whether greater values of the metric ``name`` are better.

    The longest known ending decides, with or without ``eval_`` and the name of an
    evaluation set before it, so ``eval_squad_f1`` is read as ``f1`` and
    ``cosine_accuracy@10`` as ``accuracy``. Parts are separated by ``_``, ``-``, ``/`` or a space.

    Returns:
        ``True`` or ``False`` for a known name, ``None`` for one the table does not hold.

    Example:
        >>> greater_is_better("eval_accuracy"), greater_is_better("eval_wer"), greater_is_better("eval_zork")
        (True, False, None)
    """
    parts = re.split(r"[-_/ ]", re.sub(r"@\d+$", "", name.lower()).removeprefix("eval_"))
    for first in range(len(parts)):
        ending = "_".join(parts[first:])
        if ending in LOWER_IS_BETTER:
            return False
        if ending in HIGHER_IS_BETTER:
            return True
    return None


def evaluation_loss_key(metrics: dict[str, Any]) -> str:
    """Return the key of the loss in what one evaluation gave: ``eval_loss``, or ``eval_<set>_loss`` of its set.

    The prefix is known by the running time that every evaluation reports.

    Example:
        >>> evaluation_loss_key({"eval_web_loss": 2.0, "eval_web_mlm_loss": 9.0, "eval_web_runtime": 0.5})
        'eval_web_loss'
    """
    for key in metrics:
        if key.startswith("eval_") and key.endswith("_runtime"):
            return key.removesuffix("_runtime") + "_loss"
    return "eval_loss"
