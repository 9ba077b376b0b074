"""How voila serves the playground: `make playground`.

Each page has a kernel of its own, a Python with PyTorch in it. A closed page ends its kernel; one that was left otherwise is idle and
without a connection, and ends after ten minutes. A page that is looked at keeps its kernel, however long nothing is moved.
"""
from uuid import uuid4

from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager
from tornado.web import HTTPError
from traitlets import Integer

FULL = ('{} pages of the playground are open, as many as this server starts kernels for: close one, or wait {} minutes, '
        'then load this page again')


class FewKernels(AsyncMappingKernelManager):
    "At most so many kernels at a time, those that are starting counted."
    most = Integer(4, config=True)
    starting = frozenset()

    async def start_kernel(self, **kwargs):
        name = str(uuid4())
        if len({*self.list_kernel_ids(), *self.starting}) >= self.most:
            raise HTTPError(503, reason=FULL.format(self.most, -(-(self.cull_idle_timeout + self.cull_interval) // 60)))
        self.starting |= {name}
        try: return await super().start_kernel(kernel_id=name, **kwargs)
        finally: self.starting -= {name}


c = get_config()   # noqa: F821 (voila gives it to this file)
c.Voila.ip = '127.0.0.1'      # this machine alone
c.Voila.auto_token = True     # and of its users only who has the address that is printed and opened
c.VoilaConfiguration.multi_kernel_manager_class = FewKernels
c.VoilaConfiguration.extension_denylist = ['jupyterlab-jupytext']
c.MappingKernelManager.cull_idle_timeout = 600   # seconds
c.MappingKernelManager.cull_interval = 30
c.MappingKernelManager.cull_busy = True          # without a page nobody waits for what it computes
