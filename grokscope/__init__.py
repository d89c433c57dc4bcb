"""grokscope: look inside Grok-1 while it generates.

    import grokscope as gs
    grok = gs.load()                                        # the bundled grok-1-mini
    trace = grok.generate("Once upon a time", max_new_tokens=64)
    trace["router_logits"]                                  # numpy [layer, position, expert]

Names are imported when they are first used: `import grokscope` loads neither jax nor matplotlib.
"""

import importlib.util
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_NAMES = {
    "GROK_1": "grokscope.config",
    "GrokConfig": "grokscope.config",
    "Grok": "grokscope.run.engine",
    "Loss": "grokscope.run.engine",
    "TokenEvent": "grokscope.run.engine",
    "load": "grokscope.run.engine",
    "cluster": "grokscope.notebook.cluster",
    "Cluster": "grokscope.notebook.cluster",
    "ClusterError": "grokscope.notebook.cluster",
    "Trace": "grokscope.run.trace",
    "open": "grokscope.run.dump",
    "Dump": "grokscope.run.dump",
    "Plan": "grokscope.run.plan",
    "capture": "grokscope.run.captures",
    "REDUCTIONS": "grokscope.run.captures",
    "Edit": "grokscope.run.edits",
    "scale": "grokscope.run.edits",
    "add": "grokscope.run.edits",
    "set": "grokscope.run.edits",
    "patch": "grokscope.run.edits",
    "ablate": "grokscope.run.edits",
    "edit": "grokscope.run.edits",
    "route": "grokscope.run.edits",
    "TAPS": "grokscope.model.taps",
    "compare": "grokscope.analysis.compare",
    "explore": "grokscope.notebook.widgets.explore",
    "view": "grokscope.notebook.widgets.page",
    "Tokenizer": "grokscope.tokenizer",
    "verify": "grokscope.checkpoint.ckpt0",
}
_CLUSTER = [name for name, room in _NAMES.items() if room == "grokscope.notebook.cluster"]  # of an extra
_MODULES = {"analysis": "grokscope.analysis", "plot": "grokscope.notebook.plots"}

__all__ = [*_NAMES, *_MODULES]

if TYPE_CHECKING:
    from grokscope import analysis
    from grokscope.analysis.compare import compare
    from grokscope.checkpoint.ckpt0 import verify
    from grokscope.config import GROK_1, GrokConfig
    from grokscope.model.taps import TAPS
    from grokscope.notebook import plots as plot
    from grokscope.notebook.cluster import Cluster, ClusterError, cluster
    from grokscope.notebook.widgets.explore import explore
    from grokscope.notebook.widgets.page import view
    from grokscope.run.captures import REDUCTIONS, capture
    from grokscope.run.dump import Dump, open
    from grokscope.run.edits import Edit, ablate, add, edit, patch, route, scale, set
    from grokscope.run.engine import Grok, Loss, TokenEvent, load
    from grokscope.run.plan import Plan
    from grokscope.run.trace import Trace
    from grokscope.tokenizer import Tokenizer


def __getattr__(name: str):
    if name in _NAMES:
        try:
            return getattr(importlib.import_module(_NAMES[name]), name)
        except ModuleNotFoundError as err:
            if name not in _CLUSTER:
                raise
            raise ModuleNotFoundError(f'gs.{name} needs {err.name}: pip install -e ".[cluster]"') from err
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    raise AttributeError(f"module 'grokscope' has no attribute {name!r}")


def __dir__() -> list[str]:
    absent = () if importlib.util.find_spec("ipyparallel") else _CLUSTER
    return sorted({*__all__} - {*absent})
