"""Memory and time before the spend: what a recipe needs under each strategy, and which strategy to take."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minisft.planning.prediction import Prediction
    from minisft.recipe import Recipe


def predict_run(recipe: "Recipe") -> "Prediction":
    """Predict memory and time of a recipe on this machine, as it stands; its data must be prepared.

    Raises:
        UserError: the data is not prepared, or the model's configuration does not do.
    """
    from minisft.planning.plan import predict_here

    return predict_here(recipe)
