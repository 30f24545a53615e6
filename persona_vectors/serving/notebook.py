"""The server's page inside a notebook."""

import secrets
from collections.abc import Sequence
from html import escape
from typing import Any, SupportsIndex

from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.model.blocks import Model
from persona_vectors.serving.plan import Served
from persona_vectors.serving.run import in_thread, make_served, needs_extra
from persona_vectors.vectors.directions import vector_list
from persona_vectors.vectors.shipped import VectorLike

_HTML = """\
<iframe src="{url}" title="Persona vectors" style="width: 100%; height: {height}px; border: 0"></iframe>
<p><small>Port {port} of the machine that runs this notebook, until <code>.close()</code>. Nothing above? Then the
browser runs on another one: <code>ssh -L {port}:127.0.0.1:{port} THAT-MACHINE</code> brings it here, or, where the
notebook's server has jupyter-server-proxy, <code>pv.playground(..., url="/proxy/{{port}}/")</code>, with what stands
before <code>/lab</code> or <code>/tree</code> in the notebook's own address before it.</small></p>
"""


class Playground:
    """A chat page that a notebook shows, served by a thread of this process until it is closed."""

    url: str
    """Where the page is, with its key."""
    port: int

    def __init__(self, served: Served, *, url: str | None, height: int) -> None:
        from persona_vectors.serving.app import make_app
        from persona_vectors.serving.guard import Guard

        self.served, self.height, key = served, height, secrets.token_urlsafe(24)
        self._app: Any = make_app(served, framed=True)
        guard = Guard(self._app, hosts=["127.0.0.1", "localhost"] if url is None else None, key=key, proxied=bool(url))
        self.port, self._end = in_thread(guard)
        address = "http://127.0.0.1:{port}/" if url is None else url
        self.url = f"{address.replace('{port}', str(self.port))}#{key}"

    def close(self) -> None:
        """Finish what is being answered, and free the port; the model is as before."""
        self._end()

    def __enter__(self) -> "Playground":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Playground({self.served.name}, {', '.join(self.served.vectors)}; the page is at .url)"

    def _repr_html_(self) -> str:
        return _HTML.format(url=escape(self.url), height=self.height, port=self.port)


def playground(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    vectors: VectorLike | Sequence[VectorLike],
    *,
    layer: SupportsIndex | None = None,
    url: str | None = None,
    height: int = 800,
) -> Playground:
    """Show a notebook a page to chat with a model: a slider for each vector, and each token's projection as its colour.

    The page is that of `persona-vectors serve`, from a thread of this process on a free port that only this machine can
    reach, with a key that only the page knows. Edits are its requests' own: other threads' passes are left alone.
    `layer` is where vectors without a recommended layer begin. `close` ends it; so does a `with` around it.

    The browser has to reach the port. Where the notebook runs on another machine, an `ssh -L` of the port does it, or a
    proxy that the notebook's server has: `url` is then the page's address behind it, with "{port}" in it, such as
    "/proxy/{port}/" for jupyter-server-proxy. `.url` is the page's address, also without a notebook.

    Raises InputError where the extra is missing, vectors do not fit, or `url` has no "{port}".
    """
    if url is not None and "{port}" not in url:
        raise InputError(f"url is {url!r}: give the page's address with {{port}} in it, such as '/proxy/{{port}}/'")
    with needs_extra():
        served = make_served(model, tokenizer, vector_list(vectors), layer=layer)
        return Playground(served, url=url, height=height)
