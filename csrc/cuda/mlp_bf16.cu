#include "mlp_kernels.cuh"

namespace vmamba::cuda {
template void mlp_forward_as<__nv_bfloat16>(const MlpForward&, int, cudaStream_t);
template void mlp_residual_as<__nv_bfloat16>(const MlpResidual&, int, cudaStream_t);
template void mlp_backward_as<__nv_bfloat16>(const MlpBackward&, float*, int, cudaStream_t);
}  // namespace vmamba::cuda
