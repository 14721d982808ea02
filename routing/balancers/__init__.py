"""All balancers. A new one is a file here and a line below."""

from moe_testbed.routing.balancers import load_balancing_loss, loss_free_bias, z_loss

__all__ = ["load_balancing_loss", "loss_free_bias", "z_loss"]
