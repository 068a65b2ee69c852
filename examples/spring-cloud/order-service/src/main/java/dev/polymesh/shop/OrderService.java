package dev.polymesh.shop;

import org.springframework.boot.SpringApplication;
import org.springframework.boot.autoconfigure.SpringBootApplication;
import org.springframework.cloud.client.loadbalancer.LoadBalanced;
import org.springframework.cloud.openfeign.EnableFeignClients;
import org.springframework.context.annotation.Bean;
import org.springframework.web.client.RestTemplate;

/** Orders: it asks the inventory by Feign and by RestTemplate, as old and older code does. */
@SpringBootApplication
@EnableFeignClients
public class OrderService {
    public static void main(String[] args) {
        SpringApplication.run(OrderService.class, args);
    }

    @Bean
    @LoadBalanced
    RestTemplate restTemplate() {
        return new RestTemplate();
    }
}
