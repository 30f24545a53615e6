"""The cache of a batch of answers, with room for the tokens to come."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from persona_vectors.model.blocks import Model
from persona_vectors.model.prefill import add_hook, can_take_rows
from persona_vectors.model.wrappers import unwrap


@contextmanager
def room_in_cache(model: Model, tokens: int) -> Iterator[None]:
    """Have the next call of `generate` write keys and values in place, where there is room for `tokens` of each row.

    The library's own layers copy all that they hold at every step. Those that hold a window or a state do so still.
    """
    model = unwrap(model)
    with ExitStack() as hooks:

        def make_room(_decoder: nn.Module, args: Any, kwargs: Any) -> None:
            cache = next((each for each in (*args, *kwargs.values()) if type(each) is DynamicCache), None)
            if cache is not None and cache.get_seq_length():  # behind the prompt, at whose end rows are taken anew
                made = [RoomyLayer(layer, tokens) if type(layer) is DynamicLayer else layer for layer in cache.layers]
                cache.layers = made
                hooks.close()

        if can_take_rows(model):
            add_hook(hooks, model.get_decoder().register_forward_pre_hook, make_room, with_kwargs=True)
        yield


class RoomyLayer(DynamicLayer):
    """One layer's keys and values: the first tokens of a larger tensor, which the next ones are written to."""

    keys: Tensor
    values: Tensor

    def __init__(self, layer: Any, tokens: int) -> None:
        super().__init__()
        self.keys, self.values, self.most = layer.keys, layer.values, tokens
        self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True
        self.rooms: dict[str, tuple[Tensor, Tensor]] = {}
        """The larger tensors of both, and what of them was held when they were last written to."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys = self._appended("keys", self.keys, key_states)
        self.values = self._appended("values", self.values, value_states)
        return self.keys, self.values

    def _appended(
        self, name: str, held: Float[Tensor, "row head before size"], new: Float[Tensor, "row head new size"]
    ) -> Float[Tensor, "row head both size"]:
        room, last = self.rooms.get(name, (None, None))
        before, total = held.shape[-2], held.shape[-2] + new.shape[-2]
        if room is None or held is not last or room.shape[-2] < total:  # rows have left since, or it is full
            room = held.new_empty(*held.shape[:2], max(total, self.most), held.shape[-1])
            room[:, :, :before] = held
        room[:, :, before:total] = new
        held = room[:, :, :total]
        self.rooms[name] = room, held
        return held
