"""A linear layer on states that stay as they are: logistic regression, whose optimum is unique, so that nothing in it
is drawn or tuned.

Shape legend: M model width, X labels.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
_STEPS = 300
_SMALLEST = 1e-6


def linear_layer(train_XM: Any, train_X: Int64, test_XM: Any, freedom: float = 1.0) -> Int64:
    """Fits classes to states, and returns the class that is found for each of the others.

    Args:
        train_XM, test_XM: an array, standardised here by the mean and deviation of the first; or a sparse matrix, which
            is taken as it is.
        train_X: number of the class of each row.
        freedom: the inverse of the weight of the penalty on the squared coefficients, `C` of scikit-learn.
    """
    # It takes a second to import.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if (only := np.unique(train_X)).size == 1:
        return np.full(test_XM.shape[0], only[0])
    if isinstance(train_XM, np.ndarray):
        mean_M, deviation_M = train_XM.mean(axis=0), np.maximum(train_XM.std(axis=0), _SMALLEST)
        train_XM, test_XM = (train_XM - mean_M) / deviation_M, (test_XM - mean_M) / deviation_M
    with warnings.catch_warnings():
        # The last of so many steps is near enough.
        warnings.simplefilter("ignore", ConvergenceWarning)
        layer = LogisticRegression(C=freedom, max_iter=_STEPS).fit(train_XM, train_X)
    found: Int64 = layer.predict(test_XM)
    return found
