"""A router of your own: every expert has a vector, and a token goes to the experts with the nearest ones."""

from pydantic import Field
from torch import Tensor, cdist, nn, randn

from moe_testbed.routing.learned import gathered
from moe_testbed.routing.records import RouterSetting, RoutingContext
from moe_testbed.routing.router import Router, RouterConfig, Scores


class NearestVectorConfig(RouterConfig):  # its fields are the options under routing.router
    sharpness: float = Field(1.0, gt=0, description="factor of the mean squared differences")


class NearestVector(Router):
    Config = NearestVectorConfig

    def __init__(self, config: NearestVectorConfig, setting: RouterSetting) -> None:
        super().__init__(config, setting)
        self.vectors = nn.Parameter(randn(setting.num_experts, setting.hidden_size))

    def score(self, x_TM: Tensor, context: RoutingContext) -> Scores:  # in float32, whatever the model's precision
        differences_TE = cdist(x_TM.float(), self.vectors.float()).square() / x_TM.shape[1]
        return Scores.by_softmax(-self.config.sharpness * differences_TE)

    def select(self, scores: Scores, context: RoutingContext) -> Tensor:  # the top_k experts of every token
        return scores.affinity_TE.topk(self.setting.top_k).indices

    def weigh(self, scores: Scores, expert_ids_TK: Tensor) -> Tensor:  # factors of their outputs
        return gathered(scores.affinity_TE, expert_ids_TK, normalise=False)
