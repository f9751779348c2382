"""What a step minimises: a function of the log-probabilities of the supervised tokens.

An objective is given them with the sequence each belongs to, and returns its loss. The gradient by
the log-probabilities is autograd's, and the engines take it on through head and layers. Logits
exist a chunk at a time, whatever the objective (layers/cross_entropy.py).

It sees one part of a step at a time: a micro-batch, or what the layer engine has packed of several
(engine/packing.py). So the loss of a step is a sum over parts. For a sum over sequences
(``separable``) it does not matter how they are packed. A loss over pairs of sequences, such as
DPO's, needs both of a pair in one part: they have to be of one micro-batch, and the engine packs
nothing. What couples the sequences of a whole step can be had from a pass before, by
`LayerEngine.loss` and an objective that records, and be a constant in the step.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from halfbyte.engine.packing import Batch
from halfbyte.layers.cross_entropy import head_logps, head_loss
from halfbyte.quant import QuantizedWeight


class Objective(ABC):
    """What is minimised; an engine's ``objective`` is `CrossEntropy` until it is set to another.

    Attributes:
        separable: Whether the loss is a sum over sequences. If it is not, micro-batches are not
            packed; set the objective before the shapes of parts are chosen (``Trainer.fit``).
        needs_segments: Whether segments are made for it: not for one that overrides
            `loss_of_hidden` and `loss_of_logits` and does without.
    """

    separable = True
    needs_segments = True

    @abstractmethod
    def loss(self, logps: Tensor, segments: Tensor) -> Tensor:
        """Return the loss of a part: a scalar, the sum of its terms.

        It should not make the host wait for a GPU, as ``.item()`` and boolean indices do.

        Args:
            logps: float32 [S], the log-probabilities of the supervised tokens, each given the
                tokens before it. Autograd differentiates the loss by them.
            segments: int64 [S], the sequence that each belongs to: the number of its row, counted
                through the micro-batches of the step. Those of one sequence are adjacent.
        """

    def count_terms(self, batches: Sequence[Batch]) -> float:
        """Return the number of terms in a step, which its loss is divided by: supervised tokens."""
        return float(sum(int((batch.labels != -100).sum()) for batch in batches))

    def loss_of_hidden(
        self,
        hidden: Tensor,
        head: Tensor | QuantizedWeight,
        targets: Tensor,
        segments: Tensor | None,
        *,
        softcap: float = 0.0,
        trained: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of final hidden states [S, H]; arguments are those of `head_logps`."""
        assert segments is not None
        logps = head_logps(hidden, head, targets, softcap=softcap, trained=trained)
        return self.loss(logps, segments)

    def loss_of_logits(self, logits: Tensor, targets: Tensor, segments: Tensor | None) -> Tensor:
        """Return the loss of logits float32 [S, V] for targets int64 [S]."""
        assert segments is not None
        return self.loss(-functional.cross_entropy(logits, targets, reduction="none"), segments)


class CrossEntropy(Objective):
    """The negative log-probability of all supervised tokens.

    Every token counts the same, so its gradient by the logits needs no log-probability of another:
    loss and gradient are made in one go, and summed chunk by chunk.
    """

    needs_segments = False

    def loss(self, logps: Tensor, segments: Tensor) -> Tensor:
        """Return -Σ log p."""
        return -logps.sum()

    def loss_of_hidden(
        self,
        hidden: Tensor,
        head: Tensor | QuantizedWeight,
        targets: Tensor,
        segments: Tensor | None,
        *,
        softcap: float = 0.0,
        trained: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of final hidden states, by `head_loss`."""
        return head_loss(hidden, head, targets, softcap=softcap, trained=trained)

    def loss_of_logits(self, logits: Tensor, targets: Tensor, segments: Tensor | None) -> Tensor:
        """Return the loss of logits float32 [S, V] for targets int64 [S]."""
        return functional.cross_entropy(logits, targets, reduction="sum")


CROSS_ENTROPY = CrossEntropy()
