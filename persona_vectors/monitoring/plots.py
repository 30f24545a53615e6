"""Figures of projections."""

from persona_vectors.monitoring.projection import Scores
from persona_vectors.vectors.drawing import BLUE, GREY, Figure, bare


def plot_drift(scores: Scores, *, pooling: str = "response_mean", title: str = "projection by turn") -> Figure:
    """Plot `project(..., by_turn=True)`: each conversation's projections by turn in grey, and their mean."""
    figure = Figure(figsize=(6, 0.4 + 2.4 * len(scores.keys)), layout="constrained")
    panels = figure.subplots(len(scores.keys), squeeze=False)[:, 0]
    turns = range(1, int(scores.turn.max()) + 2)
    for axes, (key, values) in zip(panels, scores[pooling].items()):
        for conversation in scores.conversation.unique():
            own = scores.conversation == conversation
            axes.plot(scores.turn[own] + 1, values[own], color=GREY, alpha=0.4, linewidth=0.8)
        means = [float(values[scores.turn == turn - 1].nanmean()) for turn in turns]
        count = len(scores.conversation.unique())
        label = "mean" if count == 1 else f"mean of {count} conversations"
        axes.plot(turns, means, color=BLUE, marker="o", markersize=4, label=label)
        axes.set(ylabel=key, xticks=turns[:: 1 + len(turns) // 12])
        bare(axes)
    panels[0].set_title(title)
    panels[0].legend(frameon=False, fontsize=9)
    panels[-1].set_xlabel(f"turn ({pooling}; each grey line is a conversation)")
    return figure
