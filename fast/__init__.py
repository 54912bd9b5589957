"""The same networks with less to wait for, on a CPU. No step of the paper needs this room, and no taught module imports it.

engines.py          `load` a model for any engine; which graphs belong to which weights and code
compare.py          does an engine compute what model.py computes?
torch_engine.py     engine `fast`: batch norms folded into convolutions
decoder.py          the mask decoder with its sums in another order, the same logits but for rounding
cells.py            which cells of the embedding a mask is wanted in
graphs.py           the network as graphs, traced from PyTorch's
openvino_engine.py  these graphs run by Intel's OpenVINO, without PyTorch
static_int8.py      the encoder's graph with int8 layers: what `03_quantize.py --method static` does
counts.py           multiply-adds and seconds of a network's parts, and how many of them int8 reaches
report.py           the report of step 3 as text
"""

ENGINES = ("fast", "openvino", "openvino-int8")  # of this room; segment.ENGINES are the others
# Numbers of the OpenVINO engines, int8 layers apart. auto: bf16 where the processor has it, else f32
PRECISIONS = ("auto", "f32", "bf16")
