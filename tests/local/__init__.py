# SPDX-License-Identifier: Apache-2.0
"""The local level: what hosts keep, lose, and give back.

Scenes of lost and damaged hosts, and where each is played (``parallel/test_scenes.py`` if
no file is named):

- all processes are killed: test_all_processes_die..., jobs/test_lost_disks.py
- each host in turn loses its disk, or is off: test_each_host_in_turn...,
  test_a_host_that_is_gone..., jobs/test_lost_disks.py; five in a row under Slurm:
  ../cli/jobs/test_slurm.py
- two of three are off with two copies: test_two_of_three..., test_more_lost_hosts...
- a host is back with an older run: test_a_host_that_comes_back...
- root is on another host, or all hosts are others: test_a_root_on_another_host...,
  test_all_hosts_lost...
- one bit is flipped in a copy: test_a_flipped_byte..., test_a_damaged_header...
- kills between any two renames, power cuts: ../crash/test_hosts.py, test_renames_cut_off...
- other numbers of ranks and hosts: test_other_numbers..., test_every_way_to_lay_ranks...
- a full disk on one host: parallel/test_failed_saves.py, jobs/test_lost_disks.py
- one directory is given to two hosts: test_one_path_for_two..., jobs/test_lost_disks.py
- a successor fences a copy to the directory off: parallel/test_rescue.py
- a rescue after a loss: parallel/test_rescue.py
- a disk hangs behind the training: parallel/test_hanging_disks.py
"""
