#include "backward.cuh"

namespace vmamba::cuda {
template void backward_pass<__nv_bfloat16>(const BackwardArgs&, Pass, cudaStream_t);
}
