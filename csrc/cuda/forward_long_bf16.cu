#include "forward_long.cuh"

namespace vmamba::cuda {
template void long_forward<__nv_bfloat16>(const ForwardArgs&, bool, cudaStream_t);
}
