"""Training objectives: functions of the log-probabilities of the supervised tokens.

An objective maps these, and the sequence each belongs to, to a loss. Its gradient with respect to
the log-probabilities comes from autograd, and the engines propagate it through head and layers.
Logits exist one chunk at a time, whatever the objective (layers/cross_entropy.py).

It is called for one part of a step at a time: a micro-batch, or several packed by the layer engine
(engine/packing.py). So the loss of a step is a sum over parts. For a sum over sequences
(``separable``) packing makes no difference. A loss over pairs of sequences, such as DPO's, needs
both of a pair in one part: they must be in one micro-batch, and the engine does not pack. A
quantity that couples all sequences of a step can be computed in an earlier pass, with
`LayerEngine.loss` and a recording objective, and be a constant in the step.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from halfbyte.engine.packing import Batch
from halfbyte.layers.cross_entropy import head_logps, head_loss
from halfbyte.quant import QuantizedWeight


class Objective(ABC):
    """A function to minimise; the default ``objective`` of an engine is `CrossEntropy`.

    Attributes:
        separable: Whether the loss is a sum over sequences. If not, micro-batches are not packed;
            set the objective before the shapes of parts are chosen (``Trainer.fit``).
        needs_segments: Whether it needs segments; False is possible if `loss_of_hidden` and
            `loss_of_logits` are overridden.
        by_tokens: Whether the loss is a sum over tokens, so that it may be computed for some of
            them at a time.
    """

    separable = True
    needs_segments = True
    by_tokens = False

    @abstractmethod
    def loss(self, logps: Tensor, segments: Tensor) -> Tensor:
        """Return the loss of a part: a scalar, the sum of its terms.

        It should not synchronise with the GPU, as ``.item()`` and boolean indexing do.

        Args:
            logps: float32 [S], the log-probabilities of the supervised tokens, each given the
                tokens before it. Autograd differentiates the loss with respect to them.
            segments: int64 [S], the sequence of each: its row index over all micro-batches of the
                step. Tokens of one sequence are adjacent.
        """

    def count_terms(self, batches: Sequence[Batch]) -> float:
        """Return the divisor of a step's loss: the number of terms, here supervised tokens."""
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

    All tokens have equal weight, so the gradient w.r.t. a token's logits is independent of other
    tokens: loss and gradient are computed together and summed over chunks.
    """

    needs_segments = False
    by_tokens = True

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
        """Return the loss of final hidden states with `head_loss`."""
        return head_loss(hidden, head, targets, softcap=softcap, trained=trained)

    def loss_of_logits(self, logits: Tensor, targets: Tensor, segments: Tensor | None) -> Tensor:
        """Return the loss of logits float32 [S, V] for targets int64 [S]."""
        return functional.cross_entropy(logits, targets, reduction="sum")


CROSS_ENTROPY = CrossEntropy()
