"""Contract checks that the author of a plugin runs in the plugin's own tests.

    from trl_distill_plugins.testing import check_loss

    def test_my_loss_keeps_the_contract():
        check_loss(MyLoss, temperature=2.0)

They need neither pytest nor files nor the network, take about a second, and draw the same numbers on every run.
"""

from trl_distill_plugins.testing.loss import check_loss

__all__ = ["check_loss"]
