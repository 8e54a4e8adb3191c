#include "backward_wide.cuh"

namespace vmamba::cuda {
template void backward_wide_pass<__half>(const BackwardArgs&, Pass, cudaStream_t);
}
