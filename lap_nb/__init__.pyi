# The front door: what `import lap_nb as lap` offers. `__init__.py` reads this list, and so do editors and type checkers.
from .adapters import LeastActionMixin as LeastActionMixin, lightning_callback as lightning_callback
from .attach import trace as trace, trace_energies as trace_energies
from .certificates import Certificate as Certificate, certify as certify
from .data import Dataset as Dataset, Split as Split, circles as circles, digits as digits, load as load, moons as moons
from .depth import (
    Elastic as Elastic, RandomDepth as RandomDepth, depth_curve as depth_curve, latency as latency, shorten as shorten)
from .dynamics import (
    Flow as Flow, ResidualBlock as ResidualBlock, ResidualNet as ResidualNet, Trajectory as Trajectory)
from .ensembles import Ensemble as Ensemble, fit_many as fit_many
from .hooks import BlockHooks as BlockHooks, chosen_blocks as chosen_blocks, find_blocks as find_blocks
from .kinetic import (
    EnergyLedger as EnergyLedger, EnergyMeter as EnergyMeter, block_energies as block_energies, kinetic_energy as kinetic_energy,
    relative_energy as relative_energy)
from .least_action import DualAscent as DualAscent, FixedWeight as FixedWeight, LeastAction as LeastAction, kkt as kkt
from .nets import conv_net as conv_net, dense_net as dense_net, staged_net as staged_net
from .ranking import Ranking as Ranking, rank_blocks as rank_blocks
from .regularity import (
    holder_exponent as holder_exponent, lipschitz_profile as lipschitz_profile, local_lipschitz as local_lipschitz)
from .stats import Interval as Interval, confidence_interval as confidence_interval, rank_correlation as rank_correlation
from .tasks import Task as Task
from .training import (
    Checkpoints as Checkpoints, Diverged as Diverged, Run as Run, TrainConfig as TrainConfig, evaluate as evaluate, fit as fit)
from .transport import (
    action_split as action_split, exact_gap as exact_gap, optimal_coupling as optimal_coupling, sliced_w2 as sliced_w2)

__version__: str
