#define NAMESPACE avx512
#include "noise.inc.hpp"
