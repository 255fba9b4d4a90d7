"""Generation: the tokens that a model goes on with, chosen or drawn."""
