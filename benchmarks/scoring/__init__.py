"""Scoring and selecting of each method, `scoring_rows()`, against the procedure as its paper describes it."""
