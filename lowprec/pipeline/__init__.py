"""The stages of a run, wired to its folder: each is a function from the records of the earlier ones to its own.

    prepare -> score -> price -> choose -> prove -> summarise

A stage keeps what it makes in the folder under the digests of what it was made from, so that it is skipped when those
have not changed, and a killed run continues where it was cut: calibration and sensitivity at the block, verification
at the mix, the judge at the look.
"""
