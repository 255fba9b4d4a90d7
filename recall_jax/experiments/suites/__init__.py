"""Make suites of models from a seed, without a download, to try continual learning on."""
