"""Data frames and fitted models, held until the end: `python frames.py PROSE`. Prints 'ready'. Needs pandas and scikit-learn."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.ensemble import RandomForestRegressor
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import SGDClassifier

ROWS = 300_000
TEXTS = 20_000


def sales(random: np.random.Generator) -> pd.DataFrame:
    """A frame of numbers, categories, times and names; some are missing."""
    frame = pd.DataFrame({
        "customer": [f"customer-{number}" for number in random.integers(0, 20_000, ROWS)],
        "region": pd.Categorical(random.choice(["north", "east", "south", "west"], ROWS, p=[0.4, 0.3, 0.2, 0.1])),
        "at": pd.Timestamp("2024-01-01") + pd.to_timedelta(np.sort(random.integers(0, 31_536_000, ROWS)), unit="s"),
        "count": random.poisson(2, ROWS),
        "price": np.round(random.lognormal(3, 1, ROWS), 2),
        "discount": np.where(random.random(ROWS) < 0.7, np.nan, random.random(ROWS)),
        "weight": random.normal(10, 3, ROWS).astype("float32"),
    })  # fmt: skip
    frame["sum"] = frame["count"] * frame["price"] * (1 - frame["discount"].fillna(0))
    return frame


def texts(random: np.random.Generator, prose: str) -> list[str]:
    """Texts from `prose`, 200 to 600 characters each."""
    starts, lengths = random.integers(0, len(prose) - 600, TEXTS), random.integers(200, 600, TEXTS)
    return [prose[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def fitted(frame: pd.DataFrame, documents: list[str]) -> tuple[Any, ...]:
    """What a session with a notebook leaves in memory: groups, features, models, predictions."""
    by_day = frame.groupby(["region", frame["at"].dt.date], observed=True)["sum"].agg(["sum", "mean", "count"])
    features = pd.get_dummies(frame[["region", "count", "price", "weight"]]).to_numpy(dtype="float64")
    forest = RandomForestRegressor(n_estimators=10, max_depth=16, random_state=1).fit(features[:60_000], frame["sum"][:60_000])
    words = TfidfVectorizer(max_features=30_000)
    matrix = words.fit_transform(documents)
    classes = ["class" in document for document in documents]
    classifier = SGDClassifier(loss="log_loss", random_state=1).fit(matrix, classes)
    return by_day, features, forest, forest.predict(features), words, matrix, classifier


def main() -> None:
    """Build, fit, hold."""
    random = np.random.default_rng(1)
    frame = sales(random)
    documents = texts(random, Path(sys.argv[1]).read_text())
    held = fitted(frame, documents)
    print("ready", flush=True)
    time.sleep(3600)
    print(len(held))


if __name__ == "__main__":
    main()
