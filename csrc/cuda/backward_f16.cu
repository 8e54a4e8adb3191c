#include "backward.cuh"

namespace vmamba::cuda {
template void backward_pass<__half>(const BackwardArgs&, Pass, cudaStream_t);
}
