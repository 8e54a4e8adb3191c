#include "fused.cuh"

namespace vmamba::cuda {
template void fused_forward<__half>(const FusedArgs&, bool, cudaStream_t);
}
