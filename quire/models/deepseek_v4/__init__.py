"""DeepSeek V4: attention over compressed caches, hyper-connections, experts in every layer."""

from quire.models.deepseek_v4.config import Config as Config
from quire.models.deepseek_v4.model import Model as Model
from quire.models.deepseek_v4.mtp import Drafter as Drafter
from quire.models.deepseek_v4.names import adapt as adapt
