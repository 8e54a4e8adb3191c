#include "backward.cuh"

namespace vmamba::cuda {
template void backward_pass<float>(const BackwardArgs&, Pass, cudaStream_t);
}
