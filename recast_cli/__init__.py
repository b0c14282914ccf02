"""recast: interaction logs to a generative recommender post-trained with ReCast under stock verl."""

__version__ = "0.1.0"
