from fastapi import FastAPI, HTTPException, Request
from pydantic import BaseModel
import httpx
import os

import chain
import observe

app = FastAPI(title="ML Service")
app.include_router(chain.router)
observe.add_to(app)

class PredictionRequest(BaseModel):
    data: list[float]

class PredictionResponse(BaseModel):
    prediction: float
    confidence: float

@app.get("/health")
async def health():
    return {"status": "healthy"}

@app.get("/ready")
async def ready():
    return {"status": "ready"}

@app.post("/api/v1/predict", response_model=PredictionResponse)
async def predict(request: PredictionRequest):
    if not request.data:
        raise HTTPException(status_code=422, detail="data must hold at least one number")
    # ML 推論邏輯
    prediction = sum(request.data) / len(request.data)
    return PredictionResponse(prediction=prediction, confidence=0.95)

@app.get("/api/v1/call-go")
async def call_go_service(request: Request):
    """示範服務間呼叫 - Envoy 會自動處理 mTLS"""
    go_service_url = os.getenv("GO_SERVICE_URL", "http://go-service:8080")
    async with httpx.AsyncClient() as client:
        response = await client.get(f"{go_service_url}/health", headers=chain.trace_headers(request.headers))
        return {"go_service_response": response.json()}
