"""What a flagging run says of one vector: its mean difference, what labels say of it, and its best layer."""

from dataclasses import asdict, dataclass
from typing import Any

from persona_vectors.data.intervals import Interval


@dataclass(frozen=True)
class Labelled:
    """How well one vector's differences tell the samples that are labelled true from those labelled false."""

    auroc: Interval
    """How often a true one lies above a false one, with its 95 % interval, clustered by prompt."""
    true: int
    """How many samples with a difference are labelled true,"""
    false: int
    """and false."""
    within: float | None
    """The AUROC of pairs of one prompt; None where no prompt has both."""
    null: tuple[float, float] | None
    """How far from .5 the AUROCs of 95 % of random directions lie: isotropic ones, and ones with the covariance."""
    length: float
    """The AUROC of the answer's length alone, in tokens,"""
    sentiment: float
    """and of VADER's compound sentiment."""

    @property
    def evidence(self) -> bool:
        """Whether the AUROC is further from .5 than 95 % of both kinds' and its interval leaves .5 out."""
        apart = self.auroc.low > 0.5 or self.auroc.high < 0.5
        return self.null is not None and apart and abs(self.auroc.mean - 0.5) > max(self.null)

    def columns(self) -> dict[str, Any]:
        """Return the numbers under their names in a table."""
        null = self.null or (None, None)
        row: dict[str, Any] = self.auroc.columns("auroc") | {"true": self.true, "false": self.false}
        row |= {"auroc_within": self.within, "auroc_null_isotropic": null[0], "auroc_null_covariance": null[1]}
        return row | {"auroc_length": self.length, "auroc_sentiment": self.sentiment, "evidence": self.evidence}

    def __str__(self) -> str:
        within = "no prompt has both" if self.within is None else f"{self.within:.2f} within a prompt"
        text = f"AUROC {self.auroc} of {self.true:,} true and {self.false:,} false samples, {within}; "
        if self.null is not None:
            text += "95 % of random directions are within "
            text += f"{self.null[0]:.2f} (isotropic) and {self.null[1]:.2f} (covariance) of 0.5; "
        return text + f"length alone {self.length:.2f}, sentiment {self.sentiment:.2f}: {self._verdict}"

    @property
    def _verdict(self) -> str:
        far, others = abs(self.auroc.mean - 0.5), {"length": self.length, "sentiment": self.sentiment}
        alike = [name for name, area in others.items() if abs(area - 0.5) >= far]
        if self.evidence:
            text = "evidence" if self.auroc.mean > 0.5 else "evidence, but the true ones lie lower"
            return text + (f"; {' and '.join(alike)} alone tells them apart as well" if alike else "")
        if self.null is None:
            return "no evidence without random directions: flag with controls=100"
        if far > max(self.null):
            return "no evidence, the interval does not leave out 0.5"
        return "no evidence, more than 5 % of random directions tell them apart as well"


@dataclass(frozen=True)
class Best:
    """A vector's best layer, beside the best layers of random directions."""

    layer: int
    value: float
    """The score at that layer, with its sign."""
    beaten_isotropic: float
    """The share of isotropic random directions whose own best score is nearer to chance."""
    beaten_covariance: float
    """The same of those with the covariance of neutral answers."""

    def __str__(self) -> str:
        return (
            f"at its best layer, {self.layer}: further than the best of {self.beaten_isotropic:.0%} "
            f"of isotropic random directions and of {self.beaten_covariance:.0%} with the covariance"
        )


@dataclass(frozen=True)
class Summary:
    """One vector's projection difference over a dataset (paper, section 6)."""

    mean: float
    standard_error: float
    samples: int
    """How many samples have a difference: those with an empty answer have none."""
    enough: int | None
    """How many samples it takes for the mean's 95 % interval to leave out zero; None where no number does."""
    threshold: float | None
    """The difference from which a sample is flagged."""
    flagged: int
    beaten_isotropic: float | None = None
    """The share of isotropic random directions whose mean difference, in standard deviations, is nearer to zero."""
    beaten_covariance: float | None = None
    """The same of those with the covariance of neutral answers."""
    null: float | None = None
    """How far from zero the means of 95 % of random directions lie, of the kind that lies further: their effects
    in standard deviations, times the vector's."""
    labelled: Labelled | None = None
    """What `labels` say of it."""

    def columns(self) -> dict[str, Any]:
        """Return the numbers under their names in a table."""
        row = {name: value for name, value in asdict(self).items() if name != "labelled"}
        return row | (self.labelled.columns() if self.labelled else {})
