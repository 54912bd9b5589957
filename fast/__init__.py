"""The same networks with less to wait for, on a CPU. No step of the paper needs this room, and no taught module imports it.

engines.py          `load` a model for any engine; checks that an engine computes what model.py computes
decoder.py          the mask decoder with its sums in another order, the same logits but for rounding
openvino_engine.py  the image encoder as a graph, run by Intel's OpenVINO
static_int8.py      that graph with int8 layers: what `03_quantize.py --method static` does
counts.py           multiply-adds and seconds of a network's parts, and how many of them int8 reaches
report.py           the report of step 3 as text
"""

ENGINES = ("fast", "openvino", "openvino-int8")  # beside segment.ENGINES, which run model.py as written

ENGINES = ("fast", "openvino", "openvino-int8")  # of this room; segment.ENGINES are the others
