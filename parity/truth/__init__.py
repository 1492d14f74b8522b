"""Truth by enumeration: is the expected gradient of what is trained the gradient of what is meant?

On policies so small that every answer can be listed, an expectation is a sum. `estimators` asks it of single formulas
on a table of logits, `training` of whole batches that go through the stages of training, by the claims of `forms` and
`terms`.
"""
