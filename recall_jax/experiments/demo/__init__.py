"""A small world to merge in: five string tasks, a base that half knows them, three fine-tunes."""
