"""Ship small models to merge: five string tasks, a base that half knows them, three fine-tunes."""
