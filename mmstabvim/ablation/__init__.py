"""Ablation studies: run a matrix of trainings, report what came out.

``matrix`` says which trainings there are, ``run`` and ``job`` do them,
``results`` reads what they left, ``statistics`` condenses it, and ``report``
writes tables, figures and a page. ``tools/ablation.py`` is the command line.
"""
