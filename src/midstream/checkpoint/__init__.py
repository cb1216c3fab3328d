"""A run's state as plain data, saved by `save` and loaded by `load` and `latest`.

The way of a state (files relative to src/midstream):

    pipeline/iterator.py    streams: the iterator of each node returns its state; the root's is the
                            lane's (random access needs none: its state is the number of the batch)
    workers/readers.py      makes a batch; streams: attaches the encoded state of its lane
    workers/messages.py     Message: batch, origins, counts and lane state, sent to the main process
    loader/iterator.py      applies the message to the position, then hands the batch out
    loader/position.py      keeps each lane's last state and counts, and can undo the last messages
    loader/render.py        turns a position into the state dict of its rank
    checkpoint/write.py     encodes a lane, with nodes by number (checkpoint/spec.py)
    checkpoint/merge.py     merges the states of all ranks (checkpoint/whole_run.py gathers them)
    checkpoint/store.py     save: each rank writes a file, the last one commits the checkpoint

and back:

    checkpoint/store.py     load: reads and verifies the files of all ranks
    checkpoint/read.py      checks each state and decodes it to a RunState
    checkpoint/merge.py     merges them; RunState finds the one position at which all ranks agree
    loader/run.py           Run.load drives all of this, and keeps the state until the next iter()
    changes/adopt.py        adapts the state where batch size or mix of the pipeline differ
    loader/position.py      Position: made of the state when a pass begins; its Plan goes to readers
    workers/readers.py      restores the iterators of each lane from the Plan (workers/messages.py)

The state of a run is a dict of plain values:

    {
      "midstream": 1,            version of this format
      "fingerprint": "...",      hash of "spec"
      "spec": "{...}",           JSON text of the pipeline: nodes, names, seeds, weights, lengths
      "epoch": 2,                the epoch in progress, or the next to start
      "batches": 96,             batches of the epoch that were delivered, over all ranks
      "steps_done": 48,          batches of the epoch that each rank handed out
      "num_lanes": 48,           fixed by the first run (for random access: raised with the ranks)
      "rest": "",                rows of the epoch delivered by another pipeline; see checkpoint/changes.py
      "edits": "",               weights changed during the run; see checkpoint/changes.py
      "excluded": "",            samples left out of the run; see checkpoint/changes.py
      "lanes": {"0000": "...", ...}
    }

The state of rank r of R holds the lanes r, r + R, r + 2R, ...; a merged state holds all lanes. A
lane is a text: empty while there is nothing to record, else a JSON object. Only its entry "samples"
is always there:

    "samples", "rows": [..]    delivered over the whole run, by source as numbered in "spec"; "rows"
                               is omitted when equal to "samples"
    "tokens": [..]             tokens delivered, by source, of a pipeline that packs them
    "events"                   {"filtered": {"7": 12, "3|1": 4}, ...}: samples dropped or failed
                               over the whole run, by node number (checkpoint/spec.py) and source
    "at"                       [epoch, batches, steps_done, finished]: the position of the rank, in
                               its first lane; finished is 1 when the rank had reached its
                               end of the epoch and other ranks perhaps had not
    "tracked"                  {path: {source: {metric: [...]}}}: tracked totals of the whole
                               rank, in its first lane (see midstream.metrics)
    "told": [batch, errors]    random access: errors of a batch that were raised already
    "ahead": [[first, stride, count], ...]
                               random access: batches from "batches" on that are done already
    "lane"                     streams: the position of the lane, an object with the entries
        "epoch"                the lane's epoch; before the run's when samples were left over
        "rounds"               batches made in it
        "done"                 whether the lane has ended
        "state"                the state of the nodes
        "marks"                by node number, up to where events were counted
        "dealt"                the batch size by which rows were assigned to lanes, where it differs
        "edits"                where in the lane weights were changed, if they were
    "crc"                      checksum of the text before it

Random access resumes from "batches"; where samples failed, from the two entries above too. Streams
resume from their lanes.

Some checkpointers keep the numbers outside the lanes of one arbitrary rank only. So each rank
records its position in a lane too ("at"), and ranks saved at different steps are detected.
"""

from midstream.checkpoint.store import latest as latest
from midstream.checkpoint.store import load as load
from midstream.checkpoint.store import save as save
