from tdprobe import compare as compare
from tdprobe import contexts as contexts
from tdprobe import errors as errors
from tdprobe import hf as hf
from tdprobe import hooks as hooks
from tdprobe import latent as latent
from tdprobe import modules as modules
from tdprobe import registry as registry
from tdprobe import stats as stats
from tdprobe import tables as tables
from tdprobe import viz as viz
from tdprobe.compare.layer_list import list_layers as list_layers
from tdprobe.compare.layers import compare_layers as compare_layers
from tdprobe.compare.sweep import LayerComparison as LayerComparison
from tdprobe.errors import TdprobeError as TdprobeError
from tdprobe.latent.activation_addition import ActivationAddition as ActivationAddition
from tdprobe.latent.activation_caching import ActivationCaching as ActivationCaching
from tdprobe.latent.activation_patching import ActivationPatching as ActivationPatching
from tdprobe.latent.probing import Probing as Probing
from tdprobe.latent.representation_similarity.cka import CkaEstimator as CkaEstimator
from tdprobe.latent.scoring import LayerScoring as LayerScoring
from tdprobe.latent.steering_vectors import SteeringVectors as SteeringVectors
from tdprobe.tables import ScoreTable as ScoreTable

__version__: str
