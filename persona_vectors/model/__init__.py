"""The user's model: loading it, finding its blocks, the hook primitive, generation, passes over finished text."""
