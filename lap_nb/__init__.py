"""Train and inspect residual networks by the principle of least action: `import lap_nb as lap`.

Names are found when they are used."""
__version__ = "0.1.0"

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
del lazy_loader
