#include "fused.cuh"

namespace vmamba::cuda {
template void fused_forward<__nv_bfloat16>(const FusedArgs&, bool, cudaStream_t);
}
