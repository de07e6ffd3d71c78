"""The 13 tasks of RULER by their definition (Hsieh et al., arXiv 2404.06654; defaults of github.com/NVIDIA/RULER).

What differs, and why: words come from lists here and from the haystack instead of a package; sentences are split by
punctuation; the amount of haystack is found by bisection to the unit instead of in steps of hundreds, so that prompts
come closer to the wanted length; needles' keys are distinct, so that every question has one answer.
"""
