#include "forward.cuh"

namespace vmamba::cuda {
template void forward_pass<__nv_bfloat16>(const ForwardArgs&, Pass, bool, cudaStream_t);
}
