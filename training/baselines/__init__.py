"""Methods that HiHPQ is compared with, trained here over the same backbone, preprocessing, head, views and evaluation.

Product quantisers: :class:`training.baselines.spq.SPQ` and :class:`training.baselines.mecoq.MeCoQ`. Binary hashes:
:class:`training.baselines.cibhash.CIBHash` and :class:`training.baselines.bihalf.BiHalfNet`.

Each is written from its paper. Where paper and released code differ, a docstring says which is done. Fields of
:class:`training.config.TrainConfig` serve where they mean what the paper means; the rest are constants of the module, named
after the paper's symbols.
"""
