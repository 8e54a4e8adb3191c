#include "backward_wide.cuh"

namespace vmamba::cuda {
template void backward_wide_pass<__nv_bfloat16>(const BackwardArgs&, Pass, cudaStream_t);
}
