"""One router per HTTP resource, and what they share: schemas, errors, streams."""
