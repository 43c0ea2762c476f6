#define NAMESPACE avx2
#include "noise.inc.hpp"
